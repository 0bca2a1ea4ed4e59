from mfuser.cli import main

main()
