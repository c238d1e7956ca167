"""From structures, alignments and templates (or a seed) to AF3 training features."""
