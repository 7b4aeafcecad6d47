"""How options and recipes are read and checked, before torch is imported where that is possible."""
