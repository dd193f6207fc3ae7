"""Everything that knows about more than one device or worker. The launcher and its agents need no MXNet."""
