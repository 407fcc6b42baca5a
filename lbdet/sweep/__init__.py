"""mAP against bit-width: the runs of a sweep, where they run, and what they gave."""
