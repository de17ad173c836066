"""The model: five short files, in which no device is named."""
