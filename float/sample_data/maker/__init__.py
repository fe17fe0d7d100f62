"""How the drawn talking heads of the sample data were made."""
