"""What a person looks at: pictures of detections, curves and reports."""
