"""From files to tensors: files.py (bytes -> rows), records.py (rows -> typed records), template.py (record -> token ids),
batches.py (which rows go together)."""
