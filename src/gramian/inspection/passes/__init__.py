"""Forward and backward passes, watched: what every module and operation gives, and what the loss reaches."""
