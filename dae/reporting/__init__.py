"""What people read: pages, charts, model cards, and the records of a run that they are made from. Only recipes import it."""
