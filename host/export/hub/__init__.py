"""A trained network as a folder that the Hugging Face libraries load: weights, modeling file, tokenizer, model card.
How training reads it back is in `host.train.published`.
"""
