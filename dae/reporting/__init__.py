"""Pages, charts, model cards, and the records of a run behind them. Only recipes import it."""
