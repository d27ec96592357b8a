"""Text generation across the windows of a scaling, and the caches of keys and values that it needs."""
