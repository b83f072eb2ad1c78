"""How fast the training host is: training against the baseline, data preparation, one torch step."""
