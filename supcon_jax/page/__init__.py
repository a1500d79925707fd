"""The page that shows runs: what they left, their pictures, charts and the HTML."""
