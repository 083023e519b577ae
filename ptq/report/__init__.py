"""What a run leaves for people: tables, pictures, the files of its results."""
