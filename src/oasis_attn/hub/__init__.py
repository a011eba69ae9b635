"""Models as files: loading, conversion, model cards, stored prefixes and other formats."""
