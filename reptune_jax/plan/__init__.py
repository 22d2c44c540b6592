"""Program: what a training step would need on hardware that is not here."""
