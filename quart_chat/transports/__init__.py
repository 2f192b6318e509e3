"""How clients speak: the only place that knows requests and sockets."""
