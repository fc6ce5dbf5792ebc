"""What a checkpoint measures, for people to read: accuracy against budget, its figure, and the model card.

Nothing is imported here.
"""
