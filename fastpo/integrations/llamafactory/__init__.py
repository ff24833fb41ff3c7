"""fastpo inside LLaMA-Factory 0.9.5: its own training, with fastpo's arguments, losses and heads."""
