"""Figures of a trained model: likelihoods and bounds with standard errors, generative perplexity of samples, sweeps
over sampling settings. Nothing here changes a model.
"""
