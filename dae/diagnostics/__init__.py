"""What a trained latent promises a generative model: predictors, the report card of them, and how far each can be trusted."""
