"""What training and prediction ask of a vendor's model, and how adapters are found."""
