"""Fine-tuning under a scaling: mixed context windows on transformers' `Trainer`. Not the choice of factors."""
