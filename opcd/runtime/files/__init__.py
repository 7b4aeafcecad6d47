"""Files of the user, files of this program, and locks between processes."""
