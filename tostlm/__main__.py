from tostlm.cli import main

main()
