"""The network and its mathematics: sizes, forward pass, who attends to whom, noise schedules and loss weights.
Nothing here reads files or knows of training.
"""
