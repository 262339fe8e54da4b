"""Makes models/shapes: a small latent rectified-flow model of coloured shapes, from code alone."""
