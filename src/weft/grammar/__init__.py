"""What an output must look like: checked for frontends, turned into masks for engines. No torch;
llguidance is imported with the first grammar."""
