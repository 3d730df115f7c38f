"""What grows out of the method: previews and variations, the pyramid of your own picture."""
