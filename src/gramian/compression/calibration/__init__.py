"""What a plan rests on: which layers there are, and the second moments of their inputs and gradients."""
