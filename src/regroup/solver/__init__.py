"""Share one layer's heads: from what is known of them to new weights."""
