"""A few made-up rows for the harness's three kinds of requests."""

from datasets import Dataset, DatasetDict

QUESTIONS = ["How many clips in April?", "A train runs 3 hours.", "The cat", "2 + 3 =", "0 1 2 3 4", "def add(a, b):"]
QUESTIONS += [QUESTIONS[2], QUESTIONS[0], QUESTIONS[0]]  # equal prompts on the same process of two, and on the other
CHOICES = ["24", "90 miles", " on the mat", "5", "a + b"]


def rows(**_) -> DatasetDict:
    """Questions with choices, and each question again as a text."""
    table = [
        {"question": question, "choices": CHOICES, "answer": number % len(CHOICES), "text": f"{question} It is 30 * 3."}
        for number, question in enumerate(QUESTIONS)
    ]
    return DatasetDict({"test": Dataset.from_list(table)})
