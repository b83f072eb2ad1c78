"""What was accepted is answered: the journal on disk and the outbox that keeps its promises."""
