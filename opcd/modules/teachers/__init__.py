"""Teachers: models, records, servers, and several of them."""
