"""The living image: prototypes, transactions, journal and history. Layer 1."""
