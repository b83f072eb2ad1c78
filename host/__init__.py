"""The training host: data, model, diffusion, training, evaluation, export."""
