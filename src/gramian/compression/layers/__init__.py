"""What a layer becomes, and how it is put into a model."""
