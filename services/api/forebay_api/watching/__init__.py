"""What can be seen of the queue: status, feed, metrics, the page."""
