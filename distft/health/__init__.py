"""Is every rank alive and getting on? Each writes a small record beside the run, and looks at the others' in need."""
