from tostlm.main import main

main()
