"""What the weights alone tell: matrices, their spectra, counts of their entries, and the rules that need no more."""
