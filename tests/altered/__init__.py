"""What users do to modules, done alike to a fused one and to its plain twin: nothing may differ.

subjects.py holds the modules, compare.py what counts as the same, table.py the rows; the rows themselves stand in the
test files, one for each kind of thing that users do.
"""
