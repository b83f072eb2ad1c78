"""What one person does with many devices: see them all, and give them all a bundle."""
