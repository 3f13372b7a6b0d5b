"""Tools for shards of any origin: tars may be malicious, and every error is reported without stopping."""
