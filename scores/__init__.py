"""What fid.py scores with: feature networks, reference statistics, classifiers."""
