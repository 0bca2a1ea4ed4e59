"""Finding plugins and holding them to what they promise."""
