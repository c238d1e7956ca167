"""AlphaFold 3, one file per published part."""
