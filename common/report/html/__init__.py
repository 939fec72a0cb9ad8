"""HTML reports that open without a server or a network: of one run, or of several."""
