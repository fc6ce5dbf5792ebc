"""Does more compute help this checkpoint? The budgets against one evaluation at its best time.

    python -m training.compare_budgets CHECKPOINT --data validation.jsonl

- `measuring`: token accuracy, exact match, loss and cost of one sampler setting, by teacher forcing, and what is best
- `rows`: the examples to measure on
- `report`: the table, the verdicts, and the `lm_eval` arguments of what is best

An answer is exactly right when every one of its tokens, the end token included, is the most likely one given the true
tokens before it: then, and only then, greedy decoding gives that answer. So one pass over the data measures what
decoding would, and one setting costs about as much as scoring does.
"""
