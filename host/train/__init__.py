"""Training: batches, objectives, loss, optimizers, checkpoints, run folders, logs and plots. What a trained model is
worth is measured in `host.evaluate`.
"""
