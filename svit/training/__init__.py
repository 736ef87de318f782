"""What the tools for image classification share: recipes, data, models with their weights, the state of a training."""
