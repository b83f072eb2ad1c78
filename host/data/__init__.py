"""From text to token shards: sources (files, Hugging Face Hub), tokenizer training, splits. It knows neither torch
nor models.
"""
