"""How the modules of other libraries are replaced, one file per library. None of them is imported."""
